"""What the bare-metal guests share: C and assembly pieces, building them, reading their reports."""
