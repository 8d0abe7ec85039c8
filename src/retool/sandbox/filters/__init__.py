"""The system call filters as the kernel takes them (``*.bpf``), and the maintainers' script that makes them."""
