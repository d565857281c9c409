"""Documentation that is made from the code: ``python -m tests.docs`` writes it, a unit test tells when it is stale."""
