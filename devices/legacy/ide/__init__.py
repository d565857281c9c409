"""IDE disks and CD drives: ATA/ATAPI-8 behind the controller of Intel's PIIX4."""
