"""Code that every Triptych service builds on; nothing in here imports `services`."""
