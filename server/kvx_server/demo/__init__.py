"""`kvx demo`: conversations over long text, their KV cache kept in DRAM and on NVMe by kvx."""
