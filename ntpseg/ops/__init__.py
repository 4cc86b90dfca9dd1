"""Native and custom operators with their dispatch."""

from ntpseg.ops.extension import extension_status as extension_status
from ntpseg.ops.record import merge_entries as merge_entries
from ntpseg.ops.record import record_errors as record_errors
from ntpseg.ops.topn import topn_errors as topn_errors
