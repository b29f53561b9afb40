"""Everybody who moves blocks to and from a bucket, each in a process of its own.

client            what each of them does, and where
kvx_client        a cache with a tier of kind s3
obstore_client, awscrt_client, boto3_client    what else there is in Python
lmcache_client    awscrt as LMCache's connector uses it
"""
