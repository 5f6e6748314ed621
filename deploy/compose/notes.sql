CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, colour text NOT NULL, body text NOT NULL);
INSERT INTO notes (colour, body)
SELECT (ARRAY['red', 'blue'])[1 + g % 2], 'note ' || g FROM generate_series(1, 1000) g;
