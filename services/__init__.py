"""The Triptych services: gateway, encoder, prefill, decode, and their launcher."""
