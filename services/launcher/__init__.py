"""`triptych up`: a NATS server and every service on one machine, supervised."""
