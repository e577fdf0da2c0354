"""Every message on rbee's wire, as msgspec structs, and nothing else."""
