-- wrk's script. Arguments: how many of ten requests are posts, and a file with a post's JSON body
-- in each line; for posts with a key of their own each also what their keys begin with; for uploads
-- instead the folder of a form (pictures.py), its Content-Type, and the number of the first picture.
-- At the end it writes a summary as one line of JSON; times are microseconds.

local bodies, posts_of_ten, count = {}, 0, 0
local before, after
local place_of_key = "KEY"

local function mixed()
   count = count + 1
   if count % 10 < posts_of_ten then
      return bodies[count % #bodies + 1]
   end
   return read
end

local function with_key()
   count = count + 1
   local post = bodies[count % #bodies + 1]
   return post.before .. count .. post.after
end

local function upload()
   count = count + 1
   local rest, digits = count, {}
   for place = 1, 4 do
      digits[place] = 1 + rest % 255
      rest = math.floor(rest / 255)
   end
   return before .. string.char(unpack(digits)) .. after
end

local function content(path)
   local file = assert(io.open(path, "rb"))
   local bytes = file:read("*a")
   file:close()
   return bytes
end

function init(args)
   posts_of_ten = tonumber(args[1])
   if args[4] then
      before, after = content(args[3] .. "/before"), content(args[3] .. "/after")
      count = tonumber(args[5])
      local headers = { ["Content-Type"] = args[4] }
      local whole = wrk.format("POST", nil, headers, before .. "1234" .. after)
      before = whole:sub(1, -1 - #"1234" - #after)
      request = upload
      return
   end
   if args[3] then
      local headers = { ["Content-Type"] = "application/json", ["Idempotency-Key"] = place_of_key }
      for line in io.lines(args[2]) do
         local whole = wrk.format("POST", "/postchatt", headers, line)
         local at = whole:find(place_of_key, 1, true)
         bodies[#bodies + 1] = {
            before = whole:sub(1, at - 1) .. args[3],
            after = whole:sub(at + #place_of_key),
         }
      end
      request = with_key
      return
   end
   if posts_of_ten == 0 then
      return -- with no global `request`, wrk sends the same bytes again and costs nothing here
   end
   for line in io.lines(args[2]) do
      bodies[#bodies + 1] = wrk.format(
         "POST", "/postchatt", { ["Content-Type"] = "application/json" }, line
      )
   end
   read = wrk.format()
   request = mixed
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '\n{"requests":%d,"duration":%d,"bytes":%d,"p50":%d,"p99":%d,"max":%d,' ..
      '"errors":{"connect":%d,"read":%d,"write":%d,"timeout":%d,"status":%d}}\n',
      summary.requests, summary.duration, summary.bytes,
      latency:percentile(50), latency:percentile(99), latency.max,
      errors.connect, errors.read, errors.write, errors.timeout, errors.status
   ))
end
