"""The teacher's side of an evaluation: held-out inputs, ablations, sampling on any grid."""
