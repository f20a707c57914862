"""What every service process is built from: settings, lifecycle, registration, task intake,
compute thread."""
