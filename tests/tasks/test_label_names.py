"""Labels by name: of the splits of a data set, of a run that goes on, of a run that starts anew."""

import re
import types

import pytest

from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.stored import ModelDescription
from gcnet_jax.tasks.label_names import check_same_labels, check_splits, plan_classifier


def description(labels=(), classes=None):
    count = len(labels) if classes is None else classes
    return ModelDescription('resnet18', {'num_classes': count}, tuple(labels))


def split(labels, split='train'):
    return types.SimpleNamespace(
        name='pets', split=split, label_names=tuple(labels), num_classes=len(labels)
    )


def test_both_splits_and_the_classifier_have_the_same_labels():
    check_splits(split('abc'), split('abc', 'test'), None)
    check_splits(split('abc'), split('abc', 'test'), 3)
    with pytest.raises(ConfigError, match=r"'train' and 'test' of pets have different labels"):
        check_splits(split('abc'), split('abd', 'test'), None)
    with pytest.raises(ConfigError, match=r'num_classes is 2, but data set pets has 3 labels'):
        check_splits(split('abc'), split('abc', 'test'), 2)


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (('a', 'b', 'bb', 'd'), "on other labels: the data set is now without 'c', with 'bb'; "),
        (('b', 'c', 'd', 'e'), "on other labels: the data set is now without 'a', with 'e'; "),
        (('a', 'b', 'c'), "on 4 labels, and the data set now has 3: without 'd'; "),
        (
            ('a', 'b', 'c', 'e', 'f', 'g', 'h'),
            "data set now has 7: without 'd', with 'e', 'f', 'g' and 1 more; ",
        ),
        (('b', 'a', 'c', 'd'), "on other labels, in another order: label 0 was 'a', and "),
        (('a', 'b', 'c', 'c'), "on other labels: the data set is now without 'd', with 'c'; "),
    ],
)
def test_other_labels_are_named(labels, message):
    check_same_labels('x', (), labels)  # Nothing is known.
    check_same_labels('x', labels, labels)
    with pytest.raises(CheckpointError, match=f'x holds a run .*{message}'):
        check_same_labels('x', ('a', 'b', 'c', 'd'), labels)


@pytest.mark.parametrize(
    ('here', 'there', 'kept', 'text'),
    [
        ('abc', 'abc', None, 'is kept: all 3 labels are the same'),
        ('abc', 'cab', ((0, 1), (1, 2), (2, 0)), '3 of 3 outputs .* by their label names$'),
        ('abx', 'abc', ((0, 0), (1, 1)), '2 of 3 .*; 1 start at random: x$'),
        ('bcde', 'ab', ((0, 1),), '1 of 4 .*; 3 start at random: c, d, e$'),
        ('aab', 'abc', ((2, 1),), '1 of 3 .*; 2 start at random: a, a$'),
        ('abc', 'xyz', (), r"none of the checkpoint's 3 labels \(x, ...\) is in the data set \(a"),
    ],
)
def test_a_classifier_is_taken_over_by_label_names(here, there, kept, text):
    plan = plan_classifier(description(here), description(there), None, 'x')
    assert plan.kept == kept
    assert re.search(text, plan.text)


def test_a_classifier_without_names_is_kept_only_when_told():
    here, there = description('abc'), description(classes=3)
    with pytest.raises(CheckpointError, match=r'no label names.*new_classifier=True.*or False'):
        plan_classifier(here, there, None, 'x')
    assert plan_classifier(here, there, False, 'x').kept is None
    assert plan_classifier(here, there, True, 'x').kept == ()
    other = plan_classifier(here, description(classes=1000), None, 'x')
    assert other.kept == ()
    assert '1000 classes have no names' in other.text
    with pytest.raises(CheckpointError, match='has 1000 classes, the data set 3; leave'):
        plan_classifier(here, description(classes=1000), False, 'x')
    # The user decides, whatever the names are.
    assert plan_classifier(here, description('cab'), False, 'x').kept is None
    assert plan_classifier(here, description('abc'), True, 'x').kept == ()
    assert plan_classifier(here, description(classes=0), None, 'x').kept == ()
