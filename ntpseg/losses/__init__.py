"""The NkTP + TCL + HET loss: public function, counts, reference and backends."""

from ntpseg.losses.api import NTPLoss, ntp_loss
from ntpseg.losses.options import LossOptions, NTPOutput, NumItems
from ntpseg.losses.supervision import count_items
from ntpseg.losses.token_nll import token_nll

__all__ = ["LossOptions", "NTPLoss", "NTPOutput", "NumItems", "count_items", "ntp_loss", "token_nll"]
