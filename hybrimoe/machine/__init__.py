"""What this machine is and can do: calibration, profiles, `hybrimoe doctor`."""
