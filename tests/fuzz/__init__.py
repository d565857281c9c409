"""Fuzzing of what guests can reach. ``python -m tests.fuzz --help``; the short runs are in tests/unit and tests/kvm."""
