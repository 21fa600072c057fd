"""Figures, each beside a peer or a floor of the same run. A bench is a module with `main(arguments) -> int`."""
