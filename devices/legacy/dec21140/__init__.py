"""The legacy network adapter: a DEC 21140A, as Hyper-V's first generation has it."""
