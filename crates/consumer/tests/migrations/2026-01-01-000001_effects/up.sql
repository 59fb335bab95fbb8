-- The projection of the tests; it would also take an effect twice.
CREATE TABLE effects (n bigint GENERATED ALWAYS AS IDENTITY, entity text, version bigint, instance text);
