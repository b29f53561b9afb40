"""What the backends of device memory share: their end of an agent, and how devices copy.

Whoever owns the target copies: the reader of a read, the receiver of a write. So nothing of ours is
ever written by anybody else's device, and what is in flight is always known here.

    endpoint    an agent's end, but for the way the bytes go
    messages    what two ends tell each other
    receiving   writes of peers, done here
    writes      writes of ours, done by their receivers; outgoing is one of them
    active      what is under way until it has quiesced
    job         the handle of a transfer
    plan        what one transfer copies
    desk        one device and its thread; turns says who writes what
    driver      is there one?
    staging     blocks brought into host memory; pinned is such memory
    marks       points in streams that leases wait for
    alarm       calls that are due at a time
    clerk       threads that take work in order
"""
