"""Network load balancing between VMs: HAProxy, kept in step with where the VMs are and how they are."""
