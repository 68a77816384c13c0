"""The files of a set beside the tars: names, manifest, plan, sidecars, failures, locks."""
