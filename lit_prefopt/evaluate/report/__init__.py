"""The HTML report of an evaluation: data, plots, pictures, page."""
