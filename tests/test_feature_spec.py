from cachefuse.feature_spec import FLAT, IDS, POOLED, TOKENS, FeatureSpec, modalities_of, pooled_specs


def test_names_are_made_of_modality_and_view():
    names = [FeatureSpec("image", view).name for view in (POOLED, FLAT, TOKENS, IDS)]
    assert names == ["image", "image", "image_tokens", "image_ids"]


def test_modalities_are_those_of_the_specs_and_not_of_the_names():
    specs = [FeatureSpec("user_ids", POOLED, 3), FeatureSpec("text", IDS, vocabulary=9), FeatureSpec("text", POOLED, 2)]
    assert modalities_of(specs) == ("text", "user_ids")
    assert modalities_of([]) == ()


def test_pooled_features_go_by_their_modality():
    assert pooled_specs({"a_tokens": 3}) == {"a_tokens": FeatureSpec("a_tokens", POOLED, 3)}
