"""Jobs for Slurm and Kubernetes: scripts and manifests, rendered from plain values and sent."""
