"""The storage VSP: SCSI controllers on VMBus."""
