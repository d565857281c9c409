"""VHDX images, fixed, dynamic and differencing. [MS-VHDX], Virtual Hard Disk v2 (VHDX) File Format, is the source."""
