"""The NkTP + TCL + HET loss: reference, one-pass torch backend, public function."""

from ntpseg.losses.api import NTPLoss, ntp_loss
from ntpseg.losses.options import LossOptions, NTPOutput, NumItems

__all__ = ["LossOptions", "NTPLoss", "NTPOutput", "NumItems", "ntp_loss"]
