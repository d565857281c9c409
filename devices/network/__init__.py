"""Networks as NICs see them: ports of virtual switches, and the data planes that carry their frames."""
