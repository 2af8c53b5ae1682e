"""What commands share: flags, how a command ends, devices, records of runs."""
