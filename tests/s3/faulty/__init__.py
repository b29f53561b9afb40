"""An S3 server that misbehaves as a test wants it to: a proxy before one that does not.

    with FaultProxy(s3_endpoint, seed=7) as proxy:
        proxy.rules = (
            Rule(Reset(after_bytes=1000), method="GET", attempts_max=1),   # the retry gets through
            Rule(refusal("SlowDown"), share=0.1),                          # a tenth of the rest
        )
        client = open_store(endpoint=proxy.service.url, ...)
        ...
        assert [seen.fault for seen in proxy.seen] == ...

message   HTTP/1.1 as it is read and written
faults    what can go wrong with one exchange, and `CATALOGUE`: one of each kind by name
proxy     the server; which exchange goes wrong, and the line as a whole: `frozen`, `refusing`
identity  certificates for the tests of TLS
"""
