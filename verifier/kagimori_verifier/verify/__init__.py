"""Is evidence authentic? Bytes come in; claims or an exception go out. No I/O, no clock."""
