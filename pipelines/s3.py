"""Connects to S3-compatible object stores; requests that fail with 5xx, throttling or a broken
connection are retried, after longer and longer pauses."""

from __future__ import annotations

import os
from urllib.parse import parse_qsl, urlparse

import pyarrow as pa
import pyarrow.fs as pafs

ATTEMPTS = 10


def connect(uri: str) -> tuple[pafs.S3FileSystem, str]:
    """The filesystem of an `s3://bucket/prefix`, and the path in it.

    Large objects are uploaded in several parts.

    Raises:
        pa.ArrowInvalid: the URI has credentials or an unknown option.
        OSError: the bucket's region can't be found.
    """
    parsed, options = urlparse(uri), _options(uri)
    patience = pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    return pafs.S3FileSystem(**options, retry_strategy=patience), parsed.netloc + parsed.path


def _options(uri: str) -> dict[str, str]:
    """Endpoint, scheme and region of a bucket: the URI's, or else the environment's."""
    parsed = urlparse(uri)
    if set(":@") & set(parsed.netloc):  # no bucket name has these
        raise pa.ArrowInvalid("credentials don't belong in a URI: set AWS_ACCESS_KEY_ID and so on")
    options = dict(parse_qsl(parsed.query))
    unknown = options.keys() - {"endpoint_override", "scheme", "region"}
    if unknown:
        raise pa.ArrowInvalid(f"unknown option {', '.join(sorted(unknown))} in the URI")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        # From the variable alone, pyarrow would address buckets as virtual hosts of the endpoint.
        at = urlparse(endpoint)
        options = {"endpoint_override": at.netloc + at.path, "scheme": at.scheme} | options
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options = {"region": region} | options
    elif "region" not in options and "endpoint_override" not in options:
        options["region"] = pafs.resolve_s3_region(parsed.netloc)
    return options


def put_if_absent(uri: str, path: str, data: bytes) -> bool:
    """Create the object `bucket/key` of the store at `uri` unless it exists; returns False if it
    did.

    Raises:
        OSError: the store failed to create it.
    """
    import boto3  # here, because most processes never commit
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    patience = Config(retries={"mode": "standard", "total_max_attempts": ATTEMPTS})
    bucket, key = path.split("/", 1)
    options = _options(uri)
    endpoint = options.get("endpoint_override")
    if endpoint:
        endpoint = f"{options.get('scheme') or 'https'}://{endpoint}"
    try:
        client = boto3.client(
            "s3", config=patience, endpoint_url=endpoint, region_name=options.get("region")
        )
        client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        return True
    except (ClientError, BotoCoreError) as error:  # the latter: no connection, no credentials
        answer = error.response if isinstance(error, ClientError) else {}
        if answer.get("Error", {}).get("Code") in {"PreconditionFailed", "412"}:
            return False
        raise OSError(str(error)) from error
