-- Reads token usage and errors from JSON, streams of events and of JSON lines as they pass, and from
-- streams the time of the first token. The tables above say where they are.

local function set(state, key, value)
  state.handle:streamInfo():dynamicMetadata():set("flowcontrol.usage", key, value)
end

-- The HTTP status that an error without a number stands for.
local function status_of(kind)
  kind = kind:lower()
  for _, word in ipairs(error_words) do
    if kind:find(word[1]) then return word[2] end
  end
  return 500
end

local function note_error(state, status, is_number)
  if state.has_number and not is_number then return end
  state.has_number = is_number
  set(state, "error", status)
end

-- Handle one key of a JSON object; its parent keys are in state.keys.
local function note(state, text, key, at)
  local depth, keys = state.depth, state.keys
  local base = depth > 1 and wrappers[keys[1]] and 2 or 1
  if depth == base then
    if key == "error" then
      if text:find("^%s*[{]", at) or text:find('^%s*"[^"]', at) then note_error(state, 500) end
      return
    elseif key == "error_type" then
      local kind = text:match('^%s*"([%w_.-]+)"', at)
      if kind then note_error(state, status_of(kind)) end
      return
    elseif (key == "object" or key == "type") and text:find('^%s*"error"', at) then
      state.is_error = true
      note_error(state, 500)
      return
    end
  end
  local name, is_in_error = nil, false
  if keys[base] == "usage" then
    if depth == base + 1 then
      name = usage[key]
    elseif depth == base + 2 and details[keys[base + 1]] and key == "cached_tokens" then
      name = key
    end
    -- Anthropic's first event does not count the answer yet, and may be the only one.
    if name == "output_tokens" and keys[1] == "message" then return end
  elseif depth == 1 then
    name = ollama[key]
  end
  is_in_error = depth == base + 1 and keys[base] == "error" or depth == 1 and state.is_error
  if name then
    local count = tonumber(text:match('^%s*"?(-?%d[%d.eE+-]*)"?%s*%f[,}%]%z]', at))
    if count and count >= 0 then set(state, name, count) end
  elseif is_in_error and (key == "code" or key == "type" or key == "http_code") then
    local status = tonumber(text:match("^%s*(%d+)", at))
    local kind = text:match('^%s*"([%w_.-]+)"', at)
    if status and status >= 400 and status <= 599 then
      note_error(state, status, true)
    elseif kind and kind ~= "error" then
      note_error(state, status_of(kind))
    end
  end
end

-- Scan a line of JSON, which may continue the line before.
local function scan(state, text, at)
  while true do
    at = text:find('["{}%[%]]', at)
    if not at then return end
    local sign = text:byte(at)
    if sign == 34 then
      local begin = at + 1
      at = begin
      repeat
        at = text:find('["\\]', at)
        if not at then return end
        local is_escape = text:byte(at) == 92
        at = at + (is_escape and 2 or 1)
      until not is_escape
      local colon = text:match("^%s*:()", at)
      if colon and state.depth > 0 and state.depth < 8 then
        local key = text:sub(begin, at - 2)
        state.keys[state.depth] = key
        note(state, text, key, colon)
        at = colon
      end
    else
      if sign == 123 or sign == 91 then
        state.depth = state.depth + 1
        if state.depth < 8 then state.keys[state.depth] = "" end
      else
        state.depth = math.max(0, state.depth - 1)
        if state.depth == 0 then state.is_error = false end
      end
      at = at + 1
    end
  end
end

local function note_first(state, line, at)
  if state.first then return end
  local kind = line:match('"type"%s*:%s*"([%w_.]+)"', at)
  if kind and early[kind] then return end
  state.first = true
  local late = state.handle:timestamp() - state.began
  if late > 0 then set(state, "first_token_late_ms", late) end
end

local function read_usage(state, text)
  local at
  for begin in text:gmatch('"usage"%s*:%s*(){') do at = begin end
  local found = at and text:match("^%b{}", at)
  if found then
    state.depth, state.keys = 1, { "usage" }
    scan(state, found, 1)
  end
end

-- Read what is left of a text that is too long: engines write the counts after the answer.
local function read_end(state, text)
  for key, count in text:sub(-16384):gmatch('"([%l_]+)"%s*:%s*(%d+)%f[^%w_.]') do
    if ollama[key] and #count < 16 then set(state, ollama[key], tonumber(count)) end
  end
  read_usage(state, text)
end

local function is_relevant(text, at)
  return text:find('"usage"', at, true) or text:find('"error"', at, true)
      or text:find('_count"', at, true)
end

-- Read a response that is one JSON object. In a long one only the usage is searched for.
local function read_object(state)
  local pieces, size, is_cut = {}, 0, false
  for chunk in state.handle:bodyChunks() do
    pieces[#pieces + 1] = chunk:getBytes(0, chunk:length())
    size = size + chunk:length()
    if size > 65536 then
      local text = table.concat(pieces)
      if text:find('"usage"', 1, true) then read_usage(state, text) end
      pieces = { text:sub(-16384) }
      size, is_cut = #pieces[1], true
    end
  end
  local text = table.concat(pieces)
  if not is_relevant(text, 1) then return end
  if is_cut or size > 16384 then read_end(state, text) else scan(state, text, 1) end
end

local function read(state, line, is_cut)
  is_cut = is_cut or #line > 65536
  if line == "" or is_cut then
    if is_cut then read_end(state, line:sub(-16384)) end
    state.depth, state.is_error = 0, false
    return
  end
  local at = 1
  if not state.is_lines then
    local field, value = line:match("^(%a+):()")
    if field == "error" then
      -- llama.cpp's servers before mid 2025.
      note_error(state, 500)
      state.is_error = true
      at = value
    elseif field == "data" then
      at = value
    elseif field or state.depth == 0 and not line:find("^%s*{") then
      return
    end
  end
  if not line:find("%S", at) then return end
  note_first(state, line, at)
  local is_whole = state.depth == 0 and line:find("^%s*{", at) and line:find("}%s*$", at)
  if not is_whole or state.is_error or is_relevant(line, at) then scan(state, line, at) end
end

local function read_lines(state)
  -- The pieces of a line that has not ended yet. Joined once: to join them with every chunk takes
  -- 1 ms for a line of 64 KiB, and a chunk may be a single byte.
  local pieces, size, is_return_last, is_cut = {}, 0, false, false
  for chunk in state.handle:bodyChunks() do
    state.began = state.began or state.handle:timestamp()
    local text = chunk:getBytes(0, chunk:length())
    local whole, rest = text:match("^(.*[\r\n])(.*)$")
    if whole then
      pieces[#pieces + 1] = whole
      whole = table.concat(pieces)
      -- An LF after the CR that ended the last line is not a line of its own.
      if is_return_last and whole:byte(1) == 10 then whole = whole:sub(2) end
      is_return_last = whole:byte(-1) == 13
      for line in whole:gsub("\r\n", "\n"):gmatch("([^\r\n]*)[\r\n]") do
        read(state, line, is_cut)
        is_cut = false
      end
      pieces, size, text = {}, 0, rest
    end
    pieces[#pieces + 1] = text
    size = size + #text
    if size > 65536 then
      pieces = { table.concat(pieces):sub(-16384) }
      size, is_cut = #pieces[1], true
    end
  end
  if size > 0 then read(state, table.concat(pieces), is_cut) end
end

function envoy_on_response(handle)
  local headers = handle:headers()
  if (headers:get("content-encoding") or "identity"):lower() ~= "identity" then return end
  local kind = (headers:get("content-type") or ""):lower()
  local state = { handle = handle, depth = 0, keys = {} }
  state.is_lines = kind:find("^application/x%-ndjson") ~= nil
  if state.is_lines or kind:find("^text/event%-stream") then
    read_lines(state)
  elseif kind:find("^application/json%s*%f[;%z]") then
    read_object(state)
  end
end
