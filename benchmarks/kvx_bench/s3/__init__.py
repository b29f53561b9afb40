"""Object stores to measure and to test against, and everybody who moves blocks to and from them.

rgw, rgw_keeper, ceph    a real S3 server, started for a run and gone after it
delay, delay_proxy       a line to a server that takes longer, or stands still
"""
