"""Figures, each beside a peer or a floor measured in the same run. A bench is a module with `main(arguments) -> int`."""
