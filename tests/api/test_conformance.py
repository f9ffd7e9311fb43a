"""Every field of a request, with good and bad values, is answered as the contract says."""

from __future__ import annotations

import asyncio

from tests.api.conformance import conform, missing_fields, table


def test_every_field_is_in_the_table() -> None:
    assert missing_fields() == []


def test_the_server_answers_as_the_contract_says() -> None:
    seen = asyncio.run(conform())
    assert len(seen) > 500
    different = [each for each in seen if not each.as_expected]
    assert not different, f"\n{table(different)}"
