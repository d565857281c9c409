"""What ``make demo`` shows: the probe on ``/dev/kvm``, then a stock Debian guest that uses its disk on VMBus.

`session` runs the guests, on this host or in the lab, and leaves what they said; `place` chooses where; `verdict`
compares it with what should be; `show` tells people.
"""
