"""What is compared, by name."""

PROBE, BASELINE, NOISE, PACE, PACE_KL = "linear probe", "baseline", "noise only", "PACE", "PACE, KL"
METHODS = (PROBE, BASELINE, NOISE, PACE, PACE_KL)
# PACE with a λ and σ that are given, not chosen.
STRONGER, STRONGER_KL = "PACE, stronger", "PACE, KL, stronger"
