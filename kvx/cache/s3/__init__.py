"""The S3 tier: groups of blocks as objects that machines share.

store      what is asked of an object store, and how its calls fail
format     the bytes of an object (pure): encode, decode_frames
header     what it says of itself: shape, header, footer (pure)
names      how it is named (pure)
seal       its encryption; keyring: with whose key
effort     how hard a call is tried: deadlines, retries, hedges, concurrency, breaker
tier       which of it a cache uses
"""
