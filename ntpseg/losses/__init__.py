"""The NkTP + TCL + HET loss: reference, one-pass torch backend, public function."""
