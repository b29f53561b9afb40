"""What peers ask before they copy out of device memory of this agent.

A read is allowed and then done by the peer; nobody here touches it again. What ends it is its
lease, which the peer looks at before and after.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kvx.errors import KvxError, StaleReference, UsageError
from kvx.transfer.agents.lease_token import Rights
from kvx.transfer.backends.device.job import code_of
from kvx.transfer.backends.device.messages import Open, Opened
from kvx.transfer.backends.fields import lease_of, text_of
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from kvx.transfer.backends.cuda_ipc.endpoint import CudaIpcEndpoint
    from kvx.transfer.backends.device.marks import Marks


class Allowing:
    """Answers those who want to read; on the endpoint's clerk."""

    def __init__(self, endpoint: CudaIpcEndpoint, marks: Marks) -> None:
        """Allow nobody yet."""
        self._endpoint = endpoint
        self._host = endpoint.host
        self._marks = marks

    def open(self, peer: str, word: Open) -> None:
        """Say whether a peer may copy under a lease, and where from."""
        try:
            region = self._check_lease(peer, word)
        except KvxError as error:
            self._refuse(peer, word, error)
            return
        mark = self._marks.of(word.lease[0])
        export = self._endpoint.exports.get(region)
        if mark is None or export is None:
            self._allow(peer, word)
            return

        def reached(code: Code) -> None:
            # By the clerk, so that what is said of a region stays in order.
            self._endpoint.clerk.do(functools.partial(self._reached, peer, word, code))

        export.desk.do(lambda: export.desk.when(mark, reached))

    def _check_lease(self, peer: str, word: Open) -> int:
        use = self._host.use_lease(peer, lease_of(word.lease), int(Rights.READ))
        try:
            if use.region != word.region:
                raise UsageError(f"the lease is on region {use.region}, not on {word.region}")
            return use.region
        finally:
            use.end()

    def _reached(self, peer: str, word: Open, code: Code) -> None:
        try:
            if code is not Code.OK:
                raise StaleReference("the device failed before the blocks were made")
            self._check_lease(peer, word)
        except KvxError as error:
            self._refuse(peer, word, error)
            return
        self._allow(peer, word)

    def _allow(self, peer: str, word: Open) -> None:
        handle = None
        try:
            if word.wants_handle:
                handle = self._endpoint.exports.hand_out(word.region, peer, word.door)
        except KvxError as error:
            self._refuse(peer, word, error)
            return
        self._endpoint.try_send(peer, Opened(word.number, Code.OK, "", handle))

    def _refuse(self, peer: str, word: Open, error: KvxError) -> None:
        self._endpoint.try_send(peer, Opened(word.number, code_of(error), text_of(error), None))
