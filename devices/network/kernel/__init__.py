"""The data plane of the kernel: a bridge that keeps VLANs apart, TAPs, nftables and traffic control."""
