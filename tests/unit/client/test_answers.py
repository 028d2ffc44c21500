"""What the command line reads is what the controller tells: every field exists there, and may be null where it may."""

from __future__ import annotations

import types
import typing

import msgspec
import pytest

from kvmesh.client import answers, explanations, operations
from kvmesh.controller import operation_views, request_views, views

PAIRS = [
    (answers.Health, views.HealthView),
    (answers.Difference, views.DifferenceView),
    (answers.FormatOf, views.FormatView),
    (answers.Statistics, views.StatisticsView),
    (answers.InstanceRates, views.RatesView),
    (answers.Instance, views.InstanceView),
    (answers.Departed, views.DepartedView),
    (answers.Instances, views.InstancesView),
    (answers.Incompatibility, views.IncompatibilityView),
    (answers.Refusal, views.RefusalView),
    (answers.Totals, views.TotalsView),
    (answers.Fetch, views.FetchView),
    (answers.HeldChunk, views.ChunkView),
    (answers.Prefix, views.PrefixView),
    (answers.LookupFormat, views.LookupFormatView),
    (answers.HitRate, request_views.RatesView),
    (answers.HitRatesOf, request_views.InstanceRatesView),
    (answers.HitRates, request_views.HitRatesView),
    (operations.OperationError, operation_views.ProblemView),
    (operations.OperationPart, operation_views.PartView),
    (operations.Operation, operation_views.OperationView),
    (explanations.Found, request_views.FoundView),
    (explanations.Unanswered, request_views.UnansweredView),
    (explanations.RecentRequest, request_views.RecentRequestView),
    (explanations.Span, request_views.SpanView),
    (explanations.Cause, request_views.CauseView),
    (explanations.FetchOf, request_views.FetchPartView),
    (explanations.Explanation, request_views.ExplanationView),
    (explanations.Explanations, request_views.ExplanationsView),
    (explanations.MissesOf, request_views.MissShareView),
    (explanations.Summary, request_views.MissSummaryView),
    (explanations.Summaries, request_views.WhyMissedView),
]


def may_be_null(annotation: object) -> bool:
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return is_union and type(None) in typing.get_args(annotation)


@pytest.mark.parametrize(("read", "told"), PAIRS, ids=lambda one: one.__name__)
def test_what_is_read_is_told(read, told):
    hints = typing.get_type_hints(read)
    for field in msgspec.structs.fields(read):
        assert field.encode_name in told.model_fields, field.name
        null = may_be_null(told.model_fields[field.encode_name].annotation)
        assert not null or may_be_null(hints[field.name]), f"{field.name} may be null"
