"""What both stages use and neither owns: errors, configuration, files, seeds, the noise schedule, the network."""
