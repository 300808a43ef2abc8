"""Work for a device submitted by compiled code: the driver's functions by address, and a queue of copies on them."""
