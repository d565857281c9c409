"""Getting a guest from power-on to its first instruction: loaders, firmware tables and the board's addresses."""
