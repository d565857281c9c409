"""VHD images: fixed, dynamic and differencing.

Source: Microsoft's Virtual Hard Disk Image Format Specification, version 1.0 (October 2006). What the tools of others
do beyond it is told where it matters; facts about them come from QEMU's block/vpc.c and libvhdi's documentation.
"""
