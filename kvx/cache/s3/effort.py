"""placeholder"""

import asyncio, time
from kvx.cache.s3.store import ObjectError, ObjectFault


class Effort:
    def __init__(self, *, max_in_flight, breaker, instruments):
        self.b = breaker
        self.i = instruments

    def is_up(self):
        return self.b.allow()

    def stats(self):
        return {}

    async def call(self, verb, attempt, *, ends_at, may_hedge=False):
        try:
            r = await asyncio.wait_for(attempt(), max(0.001, ends_at - time.monotonic()))
        except ObjectError as e:
            (self.b.failure if e.fault.is_outage else self.b.success)()
            raise
        except TimeoutError:
            self.b.failure()
            raise ObjectError("late", fault=ObjectFault.TIMEOUT)
        self.b.success()
        return r
