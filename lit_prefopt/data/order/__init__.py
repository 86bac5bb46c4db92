"""The order of an epoch: plan, aspect buckets, image shapes, position for resume."""
