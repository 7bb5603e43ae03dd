"""The modelled clock: a device model says how long a step takes."""
