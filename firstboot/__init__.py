"""firstboot: from N identical hosts with one shared user-data to exactly one cluster."""
