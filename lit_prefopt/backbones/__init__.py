"""One model family, one file."""

from lit_prefopt.backbones.backbone import Backbone

__all__ = ["Backbone"]
